"""The learned pieces of methods: router, gate, summary tokens."""
