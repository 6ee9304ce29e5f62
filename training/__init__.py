"""From pictures and a class phrase to a residual embedding: the rooms behind `train_residual.py`."""
