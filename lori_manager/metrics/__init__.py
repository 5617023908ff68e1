"""Pure functions from outcomes and score matrices to figures; numpy only."""
