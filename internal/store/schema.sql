-- Creates the only table of phone-number-service, on MySQL-compatible engines and on
-- SQLite (to which /*! ... */ is a comment). The service applies this file at start if
-- the table is missing. If its user may not create tables, apply it by hand:
--   CREATE DATABASE PhoneNumberService DEFAULT CHARACTER SET ascii COLLATE ascii_bin;
--   mysql PhoneNumberService < phonenumberservice.sql
CREATE TABLE IF NOT EXISTS phone_numbers (
  phone_number VARCHAR(16)     NOT NULL PRIMARY KEY, -- E.164 with its plus
  version      BINARY(16)      NOT NULL,             -- random, changes with every write
  begun_at     BIGINT          NOT NULL,             -- begin of last send, microseconds since 1970 UTC (row purge: end of its lease)
  state        VARBINARY(1024) NOT NULL              -- format byte, last send ID, codes (send ID, HMAC, time, attempts), last events
  /*! , KEY begun_at (begun_at) */
) /*! ENGINE=InnoDB DEFAULT CHARACTER SET ascii COLLATE ascii_bin */;
