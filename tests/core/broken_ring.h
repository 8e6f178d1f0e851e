// A ring that is wrong on purpose, for the tests' control.
#pragma once

// hand_over() over the ring compiled from the same header with every release made relaxed; the
// sanitizer's report goes nowhere.
int hand_over_broken_ring(int slots);
