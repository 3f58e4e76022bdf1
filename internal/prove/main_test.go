package prove

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	_ "github.com/Shopify/toxiproxy/v2"
	_ "github.com/anishathalye/porcupine"
	_ "github.com/go-sql-driver/mysql"
	_ "google.golang.org/grpc"

	"github.com/liulinhuai/phone-number-service/internal/mariadbtest"
	"github.com/liulinhuai/phone-number-service/internal/servicetest"
	_ "github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
)

const root = "../.."

func TestMain(m *testing.M) {
	code := mariadbtest.Run(m)
	if built != "" {
		os.RemoveAll(filepath.Dir(built))
	}
	os.Exit(code)
}

var built string // the program, once a proof needed it

// program builds the program once, as it is released.
var program = sync.OnceValue(func() string {
	var err error
	if built, err = servicetest.Build(root); err != nil {
		panic(err)
	}
	return built
})

// A proof drives the program at binary and returns what it saw that contradicts a
// guarantee. What goes wrong with the proof itself ends t. Every proof must hold
// for the program, and find the bug that was planted for it.
type proof func(t *testing.T, binary string) (violations []string)

func prove(t *testing.T, p proof) {
	t.Helper()
	for _, v := range p(t, program()) {
		t.Error(v)
	}
}

// patience is how long a proof waits for what must come.
const patience = 90 * time.Second

func waitFor(t testing.TB, what string, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !reached(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it did not come to this within %v: %s", patience, what)
		}
	}
}
