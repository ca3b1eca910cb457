"""Plans of variants, run and compared."""
