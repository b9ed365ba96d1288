"""The modes of expert parallelism: how a rank's tokens meet the experts of other ranks."""
