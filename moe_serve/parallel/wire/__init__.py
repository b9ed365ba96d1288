"""What crosses process borders: addresses, sockets, messages, exchanges of tokens."""
