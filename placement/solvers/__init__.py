"""One file per method: the file's name is its name on the command line, and it exports

    solve(problem: PlacementProblem, run: Run) -> Layout

a function of the problem, and of the run's seed and effort. It offers layouts to the run as it finds them.
"""
