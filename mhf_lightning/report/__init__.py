"""`mhf report`: one HTML page that compares runs. Imports neither torch nor Lightning."""
