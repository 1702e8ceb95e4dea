"""The explainers as their papers write them, slowly and in float64."""
