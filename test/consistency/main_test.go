package consistency

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

var built string // path of the program, once a test built it

// buildOnce builds the program once, as it is released, and returns its path.
var buildOnce = sync.OnceValue(func() string {
	var err error
	if built, err = servicetest.Build(root); err != nil {
		panic(err)
	}
	return built
})

// A guaranteeTest runs the program at binary and returns the violations of a guarantee. An error
// of the test itself ends t. It must find no violation in the program, and the bug that is
// planted for it.
type guaranteeTest func(t *testing.T, binary string) (violations []string)

// testGuarantee runs test on the program as it is.
func testGuarantee(t *testing.T, test guaranteeTest) {
	t.Helper()
	for _, v := range test(t, buildOnce()) {
		t.Error(v)
	}
}

// waitTimeout is how long a test waits for a condition that must become true.
const waitTimeout = 90 * time.Second

// waitFor waits until reached returns true. condition describes it.
func waitFor(t testing.TB, condition string, reached func() bool) {
	t.Helper()
	for deadline := time.Now().Add(waitTimeout); !reached(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timeout after %v; want this condition: %s", waitTimeout, condition)
		}
	}
}
