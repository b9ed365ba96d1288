"""Learn which experts come next from recorded routes, and judge the forecasts on sequences that were not learnt from.

moe-serve trace --prompts prompts.txt -o trace.npz      # first record some
.venv/bin/python examples/predictor.py trace.npz
"""

import sys

from predictors import Training, evaluate, find_method, load_trace, split_sequences


def main() -> None:
    trace = load_trace(sys.argv[1])
    learnt, unseen = split_sequences(trace, train_frac=0.75)
    for name in ("random", "frequency", "transition"):
        predictor = find_method(name).fit(Training(learnt))
        scores = evaluate(predictor, unseen, distances=(1, 2))
        print(f"{name:12} recall one layer ahead {scores.recall(1):.2f}, two {scores.recall(2):.2f}")


if __name__ == "__main__":
    main()
