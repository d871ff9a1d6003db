"""Predict memory, FLOPs and seconds of a training step before running it, and choose a method under a budget.

Forecasts run the method's own code on fake tensors, which have shapes but no numbers.
"""

from gradcost.planning.forecast import Forecast, forecast
from gradcost.planning.plan import Plan, plan
from gradcost.planning.roofline import Rates, calibrate
from gradcost.planning.row import Row
from gradcost.planning.within import Within

__all__ = [
    "Forecast",
    "Plan",
    "Rates",
    "Row",
    "Within",
    "calibrate",
    "forecast",
    "plan",
]
