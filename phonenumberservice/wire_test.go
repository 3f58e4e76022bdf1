package phonenumberservice_test

import (
	"os"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	pb "github.com/liulinhuai/phone-number-service/phonenumberservice"
)

// TestProto_IsFrozen rejects every change of the proto. buf breaking rejects only changes that break
// a client, and accepts additions.
func TestProto_IsFrozen(t *testing.T) {
	frozen, err := os.ReadFile("frozen.json")
	if err != nil {
		t.Fatal(err)
	}
	var want descriptorpb.FileDescriptorSet
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(frozen, &want); err != nil {
		t.Fatal(err)
	}
	got := protodesc.ToFileDescriptorProto(pb.File_phonenumberservice_proto)
	if len(want.File) != 1 || !proto.Equal(got, want.File[0]) {
		t.Errorf("the proto: got %v\nwant %v, as in frozen.json", got, want.File)
	}
}
