"""The server's room: nothing here yet but its place; see docs/architecture.md for what it is to become."""
