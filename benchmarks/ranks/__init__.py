"""What many ranks cost: a cluster's trace (`simulation`), several ranks on one machine (`scaling`)."""
