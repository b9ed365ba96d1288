"""Expert parallelism: one engine over several ranks, each with the dense model and a share of the experts.

The front (HTTP, scheduler, pages) is a process of its own and holds no weights. Every step it sends its batch plan to
all ranks (`front/team.py`). The ranks compute it together (`modes/`) and send back what they sampled. A lost rank loses
no request: the front has every token, starts the ranks again and recomputes. README.md here says where to start.
"""
