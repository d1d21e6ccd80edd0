"""The ground of every measurement: text as batches, the residual stream, a model without layers, losses."""
