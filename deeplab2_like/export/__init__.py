"""Export to a SavedModel, and prediction with it. `predictor` needs neither Keras nor the systems."""
