"""Tools of developers: nothing that trains or samples imports them."""
