"""The stacked recurrent state-space world model: MAPO and its four RSSM baselines."""
