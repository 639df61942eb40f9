"""One module for each store; peer.py says what each offers."""
