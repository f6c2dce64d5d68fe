"""One file per failure that users of other EM libraries met; `common` holds what they share."""
