"""What recording costs: each folder is a set of questions, `harness` is what they share."""
