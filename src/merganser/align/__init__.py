"""Networks that started apart, brought into one order of units."""
