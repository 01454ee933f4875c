"""What the training scripts share; knows no model and no data set."""
