// Package bench measures the built program from outside: `make bench`.
package bench
