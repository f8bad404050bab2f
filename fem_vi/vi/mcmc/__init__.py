"""Reference samplers, exact in the limit of many draws: pCN, MALA, HMC, NUTS, and tempered sequential Monte Carlo."""
