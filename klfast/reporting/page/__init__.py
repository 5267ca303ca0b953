"""``klfast report --html``: one page that holds all it shows, without scripts and without the network."""
