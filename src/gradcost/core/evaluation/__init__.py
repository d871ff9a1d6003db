"""How a loss of the user is evaluated: in its modes, without a trace in the model, and with which draws."""
