"""What training loops share, whatever they train: schedules, signals, random state, memory and output directories."""
