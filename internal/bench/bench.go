// Package bench measures the built program as its users would see it: `make bench`.
package bench
