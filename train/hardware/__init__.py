"""The hardware of a training: the device of a process, and the processes of a run."""
