"""Expert parallelism: one engine over several ranks, each with the dense model and a share of the experts.

The front (HTTP, scheduler, pages) is a process of its own and holds no weights. Every step it sends its plan to
all ranks (`team`, `messages`); each rank computes the sequences or tokens that are its own, and the ranks exchange
tokens between one another over torch.distributed (`exchange`). So a lost rank loses no request: the front still
has every token, starts the ranks again and recomputes.
"""
