"""Studies: units x batch sizes x seeds over one recipe and one evaluation protocol, the form of the paper's Fig. 8."""
