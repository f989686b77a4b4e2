"""What goes in: generators, bundled sets and the user's own data."""
