# Flattens a JSON document: one line "PATH<tab>VALUE" a scalar, the parts of PATH joined by "/".
# A value of several lines gives a line each, and control characters in names become "?", so that
# no content can pass for another path. Exit status 1 and nothing printed if the text is not JSON.
# For busybox awk, which handles strings as bytes.

{ text = text $0 "\n" }

END {
    parse_value("")
    skip_space()
    if (text != "") fail()
    printf "%s", lines
}

function parse_value(path,    first, name, count) {
    skip_space()
    first = substr(text, 1, 1)
    if (first == "{") {
        advance(1)
        if (accept("}")) return
        do {
            skip_space()
            if (text !~ /^"/) fail()
            name = parse_string()
            gsub(/[\001-\037]/, "?", name)
            if (!accept(":")) fail()
            parse_value(path == "" ? name : path "/" name)
        } while (accept(","))
        if (!accept("}")) fail()
    } else if (first == "[") {
        advance(1)
        if (accept("]")) return
        do parse_value(path "/" count++); while (accept(","))
        if (!accept("]")) fail()
    } else if (first == "\"") {
        add(path, parse_string())
    } else {
        if (!match(text, /^[-+.0-9A-Za-z]+/)) fail()
        name = substr(text, 1, RLENGTH)
        advance(RLENGTH)
        add(path, name)
    }
}

function parse_string(    value, end, found) {
    advance(1)
    while (match(text, /["\\]/)) {
        end = RSTART
        value = value substr(text, 1, end - 1)
        found = substr(text, end, 1)
        advance(end)
        if (found == "\"") return value
        value = value parse_escape()
    }
    fail()
}

function parse_escape(    letter, code, low) {
    letter = substr(text, 1, 1)
    advance(1)
    if (letter == "n") return "\n"
    if (letter == "t") return "\t"
    if (letter == "r") return "\r"
    if (letter == "b") return "\b"
    if (letter == "f") return "\f"
    if (letter != "u") return letter
    code = parse_hex()
    if (code >= 55296 && code < 56320 && substr(text, 1, 2) == "\\u") {  # a surrogate pair
        advance(2)
        low = parse_hex()
        code = 65536 + (code - 55296) * 1024 + low - 56320
    }
    return utf8(code)
}

function parse_hex(    code, i, digit) {
    for (i = 1; i <= 4; i++) {
        digit = index("0123456789abcdef", tolower(substr(text, i, 1)))
        if (!digit) fail()
        code = code * 16 + digit - 1
    }
    advance(4)
    return code
}

function utf8(code) {
    if (code < 128) return sprintf("%c", code)
    if (code < 2048) return sprintf("%c%c", 192 + int(code / 64), 128 + code % 64)
    if (code < 65536)
        return sprintf("%c%c%c", 224 + int(code / 4096), 128 + int(code / 64) % 64, 128 + code % 64)
    return sprintf("%c%c%c%c", 240 + int(code / 262144), 128 + int(code / 4096) % 64,
                   128 + int(code / 64) % 64, 128 + code % 64)
}

function add(path, value,    parts, count, i) {
    count = split(value, parts, "\n")
    for (i = 1; i <= count; i++) if (parts[i] != "") lines = lines path "\t" parts[i] "\n"
}

function accept(symbol) {
    skip_space()
    if (substr(text, 1, 1) != symbol) return 0
    advance(1)
    return 1
}

function advance(count) { text = substr(text, count + 1) }

function skip_space() { sub(/^[ \t\r\n]+/, "", text) }

function fail() { lines = ""; exit 1 }
