"""What a run did, told to people: recorder, progress, traces, plots and tables. Importing it loads neither torch nor
matplotlib."""
