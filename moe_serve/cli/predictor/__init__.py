"""`moe-serve predictor train | evaluate | tokens`: which experts come next, one file of this folder each."""

HELP = "Train and judge predictors of expert routing."
