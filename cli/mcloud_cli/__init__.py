"""mcloud, the command line: people's way to the API."""
