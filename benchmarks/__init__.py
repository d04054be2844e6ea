"""Step time, memory and compile time of the two wrappers and of their peers."""
