"""Studies: units x batch sizes x seeds over one recipe and one evaluation protocol, as in the paper's Fig. 8."""
