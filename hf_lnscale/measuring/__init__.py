"""Building blocks of every measurement: text batches, the residual stream, models without some layers, and losses."""
