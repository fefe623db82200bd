"""Diffie-Hellman parameters for QEMU's TLS servers.

Without a file of them QEMU makes new ones at each start of a server: the search for a prime took
from 0.2 to 5 seconds, in which a guest waited for its volume. With this group, which has no
secrets and is trusted because everybody can derive it, the server starts in 20 ms.

Source: https://www.rfc-editor.org/rfc/rfc7919#appendix-A.1
"""

FILE = "dh-params.pem"

FFDHE2048 = b"""\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
