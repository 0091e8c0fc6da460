"""Runtime of compiled decode methods: state arena, constant binding, CUDA graphs, session, timing. Knows torch alone."""
