package consistency

import (
	"os"
	"testing"

	_ "github.com/Shopify/toxiproxy/v2"
	_ "github.com/anishathalye/porcupine"
	_ "github.com/go-sql-driver/mysql"
	_ "google.golang.org/grpc"

	_ "github.com/liulinhuai/phone-number-service/internal/sms/dysmsapitest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/mysqltest"
	"github.com/liulinhuai/phone-number-service/internal/testutil/servicetest"
)

const root = "../.."

func TestMain(m *testing.M) {
	if os.Getenv(attackVariable) != "" {
		attack()
		return
	}
	code := mysqltest.Run(m)
	servicetest.RemoveProgram()
	os.Exit(code)
}

var buildOnce = servicetest.Program

// A guaranteeTest runs the program at program and returns the violations of a guarantee. An error
// of the test itself ends t. It must find no violation in the program, and the bug that is
// planted for it.
type guaranteeTest func(t *testing.T, program string) (violations []string)

// testGuarantee runs test on the program as it is.
func testGuarantee(t *testing.T, test guaranteeTest) {
	t.Helper()
	for _, v := range test(t, buildOnce()) {
		t.Error(v)
	}
}
