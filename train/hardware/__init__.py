"""What training runs on: the device of a process, and the processes of a run."""
