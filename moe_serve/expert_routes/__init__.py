"""Which experts tokens took, and will take: routes recorded, forecast, and predictors that learn from them.

Knows no models and no HTTP.
"""
