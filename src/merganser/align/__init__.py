"""Networks that started apart, brought into one order of units."""

from merganser.align import memory as memory  # before torch takes any
