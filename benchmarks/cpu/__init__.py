"""What recording costs on a CPU and a disk; a file for each question."""
