"""The cache that the host runs: who is in which slot, what is being read, who has to leave."""
