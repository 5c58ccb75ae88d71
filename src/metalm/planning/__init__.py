"""What a run will need, by arithmetic alone: bytes, communication, operations, time; which layouts fit."""
