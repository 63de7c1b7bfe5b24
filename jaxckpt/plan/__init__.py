"""Pure planning: shardings -> who writes what and who reads what. No I/O, no clock, no communication."""
