"""What running a module shows: its call, its attention, its cache."""
